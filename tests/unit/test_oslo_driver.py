"""vchan:// under unmodified oslo.messaging programs, on the host and in the guest."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.unit.oslo_site import (
    ROOT,
    VM,
    Site,
    base,
    conf,
    descriptors,
    made_site,
    om,
    oslo_driver,
    wait,
)
from tests.unit.owned import touches_recorded
from vchan.client import Client
from vchan.io.loop import Loop
from vchan.rpc.in_flight import Answered, HandedBack, Outcome
from vchan.rpc.messages import BUSY, CALL, NO_AGENT, RELEASED, Request

PATIENT_S = 30.0


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        yield site


@pytest.fixture(scope="module")
def calm_site() -> Iterator[Site]:
    """One for all tests that disturb nothing: to end a server of oslo.messaging takes a second."""
    with made_site() as site:
        yield site


class Way(NamedTuple):
    """From which socket to which, and by which name."""

    server_url: str
    client_url: str
    name: str
    topic: str


def make_way(site: Site, way: str) -> Way:
    """Between programs of the host, into the guest, or out of it."""
    match way:
        case "host":
            return Way(site.host_url, site.host_url, "s", "t-host")
        case "down":
            return Way(site.agent_url, site.host_url, VM, "t-down")
        case _:
            return Way(site.host_url, site.agent_url, "s", "t-up")


WAYS = pytest.mark.parametrize("way", ["host", "down", "up"])


class Endpoint:
    """What the tests call."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.contexts: list[Any] = []
        self.running = 0
        self.may_go = threading.Event()

    def echo(self, ctxt: Any, **values: Any) -> Any:
        self.contexts.append(ctxt)
        return values

    def note(self, ctxt: Any, **values: Any) -> None:
        self.contexts.append(ctxt)
        self.noted.append(values)

    def sleep(self, ctxt: Any, seconds: float) -> float:
        self.running += 1
        time.sleep(seconds)
        self.running -= 1
        return seconds

    def stay(self, ctxt: Any) -> None:
        self.may_go.wait(PATIENT_S)

    def fail(self, ctxt: Any) -> None:
        raise Fault("broken", code=7)

    def fail_plainly(self, ctxt: Any) -> None:
        raise ValueError("bad value", 42)

    def unserialisable(self, ctxt: Any) -> Any:
        return object()

    def fail_unserialisably(self, ctxt: Any) -> None:
        raise ValueError("with", object())

    def large(self, ctxt: Any, size: int) -> str:
        return "x" * size

    def fail_largely(self, ctxt: Any) -> None:
        raise ValueError("x" * 1_000_000)


class Fault(Exception):
    """One with keyword arguments, as nova's are."""

    def __init__(self, text: str, *, code: int = 0) -> None:
        super().__init__(text)
        self.kwargs = {"code": code}


@pytest.fixture(scope="module", params=["host", "down", "up"])
def served(request: pytest.FixtureRequest, calm_site: Site) -> tuple[Way, Endpoint]:
    """A server, for each way."""
    way, endpoint = make_way(calm_site, request.param), Endpoint()
    calm_site.serve(way.server_url, endpoint, way.topic)
    if request.param == "down":
        calm_site.wait_served(way.topic)
    return way, endpoint


@pytest.fixture
def endpoint(served: tuple[Way, Endpoint]) -> Endpoint:
    """Its endpoint, as new."""
    served[1].__init__()  # type: ignore[misc]
    return served[1]


@pytest.fixture
def client(calm_site: Site, served: tuple[Way, Endpoint]) -> Any:
    """A client of its."""
    way = served[0]
    return calm_site.client(
        way.client_url, way.topic, server=way.name, timeout=PATIENT_S, exmods=(__name__,)
    )


# -------------------------------------------------------------------- calls and casts, every way


def test_call_and_cast(client: Any, served: tuple[Way, Endpoint], endpoint: Endpoint) -> None:
    values = {"n": 1, "text": "ä€😀", "list": [None, True, 1.5, {"x": []}], "big": 2**70}
    assert client.call({"request_id": "r"}, "echo", **values) == values
    # What a guest says of itself is the policy's to pass on, and not ours.
    expected = {} if served[0].topic == "t-up" else {"request_id": "r"}
    assert endpoint.contexts == [expected]
    for number in range(20):
        client.cast({}, "note", n=number)
    client.prepare(fanout=True).cast({}, "note", n=20)
    wait(lambda: len(endpoint.noted) == 21)
    assert sorted(noted["n"] for noted in endpoint.noted) == list(range(21))


def test_many_calls_of_many_threads(client: Any) -> None:
    def call(number: int) -> Any:
        return client.call({}, "echo", n=number)["n"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(call, range(300))) == list(range(300))


def test_a_remote_exception(calm_site: Site, client: Any, served: tuple[Way, Endpoint]) -> None:
    with pytest.raises(Fault) as raised:
        client.call({}, "fail")
    error: Any = raised.value
    assert (error.args, error.kwargs) == (("broken",), {"code": 7})
    assert type(error).__module__ == f"{__name__}_Remote"
    assert 'raise Fault("broken", code=7)' in str(error)
    with pytest.raises(ValueError, match="bad value") as plain:
        client.call({}, "fail_plainly")
    assert plain.value.args[1] == 42
    way = served[0]  # and one that allows no modules:
    stranger = calm_site.client(way.client_url, way.topic, server=way.name, timeout=PATIENT_S)
    with pytest.raises(om.RemoteError, match="broken") as unknown:
        stranger.call({}, "fail")
    assert unknown.value.exc_type == "Fault"
    assert 'raise Fault("broken", code=7)' in "".join(unknown.value.traceback)


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("missing", {}, "NoSuchMethod"),
        ("echo@7.5", {}, "UnsupportedVersion"),
        ("unserialisable", {}, "Cannot convert <object"),
        ("fail_unserialisably", {}, "with"),
        ("fail_largely", {}, "xxxx"),
        ("large", {"size": 5 << 20}, "over the limit of"),
    ],
)
def test_what_the_server_cannot_do_is_told_at_once(
    client: Any, method: str, arguments: dict[str, Any], text: str
) -> None:
    method, _, version = method.partition("@")
    wanted = client.prepare(version=version) if version else client
    began_s = time.monotonic()
    with pytest.raises((om.RemoteError, ValueError)) as raised:
        wanted.call({}, method, **arguments)
    assert text in repr(raised.value) + str(raised.value)
    assert time.monotonic() - began_s < PATIENT_S / 2
    assert client.call({}, "echo", n=1) == {"n": 1}


def test_a_large_message_passes_and_one_over_the_limit_does_not(client: Any) -> None:
    assert len(client.call({}, "large", size=3 << 20)) == 3 << 20
    assert client.call({}, "echo", x="y" * (1 << 20)) == {"x": "y" * (1 << 20)}
    for send in (client.call, client.cast):
        with pytest.raises(om.MessageDeliveryFailure, match="MESSAGE_BYTES_MAX"):
            send({}, "note", x="y" * (5 << 20))


def test_what_nobody_serves_is_known_at_once(client: Any) -> None:
    for wanted in (client.prepare(topic="unknown"), client.prepare(exchange="unknown")):
        for send in (wanted.call, wanted.cast):
            began_s = time.monotonic()
            with pytest.raises(om.MessageUndeliverable) as raised:
                send({}, "echo")
            assert time.monotonic() - began_s < PATIENT_S / 2
            # For programs that know only of RabbitMQ's way, which is to time out; and so on.
            assert isinstance(raised.value, om.MessagingTimeout | om.MessageDeliveryFailure)
            assert "unknown" in f"{raised.value.routing_key} {raised.value.exchange}"
            assert str(raised.value)


def test_a_timeout_withdraws_the_call(client: Any, endpoint: Endpoint) -> None:
    with pytest.raises(om.MessagingTimeout, match="Timed out waiting for a reply"):
        client.prepare(timeout=0.5).call({}, "stay")
    assert not endpoint.may_go.is_set()
    endpoint.may_go.set()
    assert client.call({}, "echo") == {}


def test_a_long_call_is_monitored(client: Any) -> None:
    long = client.prepare(timeout=600, call_monitor_timeout=3)
    assert long.call({}, "sleep", seconds=3.6) == 3.6


@WAYS
def test_a_server_that_ends_answers_what_it_runs(site: Site, way: str) -> None:
    there, endpoint = make_way(site, way), Endpoint()
    server = site.serve(there.server_url, endpoint, there.topic)
    if way == "down":
        site.wait_served(there.topic)
    client = site.client(there.client_url, there.topic, server=there.name, timeout=PATIENT_S)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(client.call, {}, "sleep", seconds=0.5)
        wait(lambda: endpoint.running == 1)
        site.end_server(server)
        assert running.result(PATIENT_S) == 0.5


def _open_calls(server: Any) -> int:
    return len(server.listener._poll_style_listener._connection.responder)


# -------------------------------------------------------------------- dispatching


class Versioned:
    """An endpoint of its own namespace and version."""

    target = om.Target(namespace="n", version="2.3")

    def echo(self, ctxt: Any, **values: Any) -> Any:
        return ["versioned", values]


class Tagging(om.Serializer):  # type: ignore[misc]
    """Makes what it passes recognisable."""

    def serialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return ["out", entity]

    def deserialize_entity(self, ctxt: Any, entity: Any) -> Any:
        return ["in", entity]

    def serialize_context(self, ctxt: Any) -> Any:
        return {**ctxt, "out": True}

    def deserialize_context(self, ctxt: Any) -> Any:
        return {**ctxt, "in": True}


def test_namespaces_versions_and_serializers(site: Site) -> None:
    endpoint = Endpoint()
    transport = site.transport(site.host_url)
    target = om.Target(topic="t", server="s")
    endpoints = [endpoint, Versioned()]
    site.run_server(om.get_rpc_server(transport, target, endpoints, serializer=Tagging()))
    client = site.client(site.host_url, timeout=PATIENT_S, serializer=Tagging())
    assert client.call({"a": 1}, "echo", x=1) == ["in", ["out", {"x": ["in", ["out", 1]]}]]
    assert endpoint.contexts == [{"a": 1, "out": True, "in": True}]
    for version in ("2.0", "2.3"):
        wanted = client.prepare(namespace="n", version=version)
        assert wanted.call({}, "echo")[1][1] == ["versioned", {}]
    for namespace, version in (("n", "2.4"), ("n", "1.0"), ("m", "2.0")):
        with pytest.raises(om.RemoteError, match="UnsupportedVersion"):
            client.prepare(namespace=namespace, version=version).call({}, "echo")


class Context:
    """As oslo.context has them: no dictionary."""

    def to_dict(self) -> dict[str, Any]:
        return {"user": "u"}


def test_a_context_that_is_an_object(site: Site) -> None:
    endpoint = Endpoint()
    site.serve(site.host_url, endpoint)
    driver = site.driver(site.host_url)
    message = {"method": "echo", "args": {}}
    driver.send(om.Target(topic="t"), Context(), message, wait_for_reply=True, timeout=PATIENT_S)
    assert endpoint.contexts == [{"user": "u"}]


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"{}", b'{"method": 1}', b'{"method": "m", "args": 1}', b"\xff"],
)
def test_a_body_that_is_none(site: Site, body: bytes) -> None:
    """From a local program that does not speak oslo.messaging's language."""
    site.serve(site.host_url, Endpoint())
    with Client(str(site.host.path)) as client:
        outcome: Any = client._outcome_of(
            Request(os.urandom(16), CALL, 30_000, 0, "openstack", "t", "", body), PATIENT_S
        )
        assert isinstance(outcome, Answered) and outcome.failed
        assert json.loads(outcome.body)["class"] == "BadBody"
        client._outcome_of(
            Request(os.urandom(16), 0, 30_000, 0, "openstack", "t", "", body), PATIENT_S
        )
    assert site.client(site.host_url, timeout=PATIENT_S).call({}, "echo") == {}


def test_results_and_failures_that_are_none(site: Site) -> None:
    """From a server that does not speak oslo.messaging's language."""
    driver: Any = site.driver(site.host_url)
    with pytest.raises(om.RemoteError, match="not JSON"):
        driver._open_answer(Answered(b"", False, b"{"))
    for body in (b"{", b"[]", b"{}", b'"text"', b'{"class": "A", "module": "builtins"}'):
        with pytest.raises(om.RemoteError):
            driver._open_answer(Answered(b"", True, body))
    harmful = {"class": "system", "module": "os", "args": ["true"]}
    with pytest.raises(om.RemoteError):
        driver._open_answer(Answered(b"", True, json.dumps(harmful).encode()))
    picky = {"class": "UnicodeDecodeError", "module": "builtins", "args": [1], "message": "m"}
    with pytest.raises(om.RemoteError, match="m"):
        driver._open_answer(Answered(b"", True, json.dumps(picky).encode()))


# -------------------------------------------------------------------- the guest's own names


def test_in_a_guest_the_server_is_the_vm_whatever_it_calls_itself(site: Site) -> None:
    endpoints = [Endpoint(), Endpoint()]
    for number, endpoint in enumerate(endpoints):
        site.serve(site.agent_url, endpoint, server=f"agent-{number}")
    site.wait_served("t")
    assert {topic.name for topic in site.host.channel.downward.topics} == {"t"}
    client = site.client(site.host_url, timeout=PATIENT_S)
    for number in range(10):
        client.prepare(server=VM).cast({}, "note", n=number)
    client.prepare(server=VM, fanout=True).cast({}, "note", n=10)
    wait(lambda: [len(endpoint.noted) for endpoint in endpoints] == [6, 6])
    with pytest.raises(om.MessageUndeliverable):
        client.prepare(server="agent-0").call({}, "echo")


def test_a_fanout_on_a_host_reaches_its_vms_and_its_programs(site: Site) -> None:
    inside, outside = Endpoint(), Endpoint()
    site.serve(site.agent_url, inside)
    site.serve(site.host_url, outside)
    site.wait_served("t")
    client = site.client(site.host_url, timeout=PATIENT_S)
    client.prepare(fanout=True).cast({}, "note", n=1)
    wait(lambda: inside.noted == outside.noted == [{"n": 1}])


def test_a_vm_goes_before_a_program_of_its_name(site: Site) -> None:
    """No local program can step in for a VM."""
    inside, outside = Endpoint(), Endpoint()
    site.serve(site.agent_url, inside)
    site.serve(site.host_url, outside, server=VM)
    site.wait_served("t")
    site.client(site.host_url, server=VM, timeout=PATIENT_S).call({}, "note", n=1)
    assert (inside.noted, outside.noted) == ([{"n": 1}], [])


# -------------------------------------------------------------------- what goes wrong


@WAYS
def test_the_server_goes_away_in_the_middle_of_a_call(site: Site, way: str) -> None:
    there = make_way(site, way)
    program = SERVER.format(url=there.server_url, topic=there.topic)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        if way == "down":
            site.wait_served(there.topic)
        client = site.client(there.client_url, there.topic, server=there.name, timeout=600)
        with ThreadPoolExecutor() as pool:
            running = pool.submit(client.call, {}, "sleep")
            assert server.stdout.readline() == b"running\n"
            server.kill()
            with pytest.raises(om.MessagingTimeout, match="went away"):
                running.result(PATIENT_S)


SERVER = """
from tests.unit.oslo_site import om, conf
import sys, time
class Endpoint:
    def sleep(self, ctxt):
        print("running", flush=True)
        time.sleep(600)
transport = om.get_rpc_transport(conf(), "{url}")
server = om.get_rpc_server(transport, om.Target(topic="{topic}", server="s"), [Endpoint()])
server.start()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_cast_that_its_server_had_not_begun_goes_to_the_next(site: Site) -> None:
    """The receipt is the server's acknowledgement, not the arrival."""
    first, second = Endpoint(), Endpoint()
    server = om.get_rpc_server(
        site.transport(site.host_url), om.Target(topic="t", server="s"), [first]
    )
    server.start(override_pool_size=1)
    client = site.client(site.host_url, timeout=PATIENT_S)
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(client.call, {}, "stay")
        wait(lambda: _open_calls(server) == 1)
        casts = [pool.submit(client.cast, {}, "note", n=n) for n in range(3)]
        wait(lambda: _open_calls(server) == 4)
        assert not any(cast.done() for cast in casts)
        site.serve(site.host_url, second)
        server.listener._poll_style_listener.cleanup()  # it goes
        for cast in casts:
            cast.result(PATIENT_S)
        with pytest.raises(om.MessagingTimeout, match="went away"):
            busy.result(PATIENT_S)
    # A cast is over when it is acknowledged, which is before it runs.
    wait(lambda: len(second.noted) == 3)
    assert sorted(noted["n"] for noted in second.noted) == [0, 1, 2]
    first.may_go.set()
    server.stop()
    server.wait()
    assert first.noted == []


def test_what_has_expired_does_not_run(site: Site) -> None:
    endpoint = Endpoint()
    server = om.get_rpc_server(
        site.transport(site.host_url), om.Target(topic="t", server="s"), [endpoint]
    )
    server.start(override_pool_size=1)
    site._servers.append(server)
    client = site.client(site.host_url, timeout=PATIENT_S)
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(client.call, {}, "stay")
        wait(lambda: _open_calls(server) == 1)
        late = pool.submit(client.prepare(timeout=0.3).call, {}, "note", n=1)
        with pytest.raises(om.MessagingTimeout):
            late.result(PATIENT_S)
        endpoint.may_go.set()
        busy.result(PATIENT_S)
    client.call({}, "note", n=2)
    assert endpoint.noted == [{"n": 2}]


def test_the_host_daemon_restarts_and_nothing_runs_twice(site: Site) -> None:
    endpoint = Endpoint()
    site.serve(site.host_url, endpoint)
    client = site.client(site.host_url, timeout=PATIENT_S)
    done = threading.Event()

    def send(sender: int) -> tuple[int, list[int]]:
        sent, lost = 0, []
        while not done.is_set():
            try:
                if sent % 3:
                    client.cast({}, "note", sender=sender, n=sent)
                else:
                    client.call({}, "note", sender=sender, n=sent)
            except om.MessagingTimeout:  # a call's answer was lost with the daemon: it may have run
                lost.append(sent)
            sent += 1
        return sent, lost

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, sender) for sender in range(4)]
        for _ in range(2):
            time.sleep(0.5)
            site.host.down()
            time.sleep(0.2)
            site.host.up()
            before = len(endpoint.noted)
            wait(lambda before=before: len(endpoint.noted) > before + 50)  # type: ignore[misc]
        done.set()
        results = [sender.result(PATIENT_S) for sender in senders]
    accepted = {
        (sender, n)
        for sender, (sent, lost) in enumerate(results)
        for n in set(range(sent)).difference(lost)
    }

    def ran() -> Counter[tuple[int, int]]:
        return Counter((noted["sender"], noted["n"]) for noted in endpoint.noted)

    # A cast is acknowledged before it runs.
    wait(lambda: accepted <= ran().keys(), lambda: accepted - ran().keys())
    assert max(ran().values()) == 1


def test_the_guest_daemon_restarts_and_nothing_runs_twice(site: Site) -> None:
    inside, outside = Endpoint(), Endpoint()
    site.serve(site.agent_url, inside)
    site.serve(site.host_url, outside, topic="up")
    site.wait_served("t")
    down = site.client(site.host_url, server=VM, timeout=PATIENT_S)
    up = site.client(site.agent_url, topic="up", timeout=PATIENT_S)
    done = threading.Event()

    def send(client: Any) -> int:
        sent = 0
        while not done.is_set():
            client.cast({}, "note", n=sent)
            sent += 1
        return sent

    with ThreadPoolExecutor(2) as pool:
        senders = [pool.submit(send, client) for client in (down, up)]
        for _ in range(2):
            time.sleep(0.5)
            site.kill_guest()
            site.start_guest()
            before = len(inside.noted), len(outside.noted)
            wait(
                lambda before=before: (  # type: ignore[misc]
                    len(inside.noted) > before[0] + 20 and len(outside.noted) > before[1] + 20
                ),
                lambda: (len(inside.noted), len(outside.noted)),
            )
        done.set()
        sent = [sender.result(PATIENT_S) for sender in senders]
    wait(lambda: len(inside.noted) >= sent[0] and len(outside.noted) >= sent[1])
    # Acknowledged before they run, they may run in another order on an executor's threads.
    assert sorted(noted["n"] for noted in inside.noted) == list(range(sent[0]))
    assert sorted(noted["n"] for noted in outside.noted) == list(range(sent[1]))


def test_a_server_that_starts_before_the_daemon(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.host.down()
    endpoint = Endpoint()
    with caplog.at_level(logging.WARNING):
        site.serve(site.host_url, endpoint)
    assert "serves as soon as the daemon is there" in caplog.text
    client = site.client(site.host_url, timeout=PATIENT_S)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(client.call, {}, "echo", n=1)
        time.sleep(0.3)
        assert not early.done()
        site.host.up()
        assert early.result(PATIENT_S) == {"n": 1}


def test_a_daemon_that_is_not_there_is_logged_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.host.down()
    driver = site.driver(site.host_url)
    with caplog.at_level(logging.INFO), pytest.raises(om.MessageDeliveryFailure):
        driver.send(om.Target(topic="t"), {}, {"method": "m"}, retry=3)
    assert caplog.text.count("it is tried again") == 1


# -------------------------------------------------------------------- BUSY, reasons, limits


Answer = Callable[[bytes], Outcome]
"""What a request comes to, by its id."""


def handed_back(reason: int, text: str) -> Answer:
    return lambda request_id: HandedBack(request_id, reason, text)


class Scripted:
    """A daemon's answers to one sending, made up."""

    def __init__(self, site: Site, answers: list[Answer]) -> None:
        self.driver: Any = site.driver(site.host_url)
        self.sent: list[Request] = []
        self._answers = answers
        engine = self.driver._running()
        engine._sender = self  # type: ignore[assignment]
        self.loop: Loop = engine.loop

    def submit(self, request: Request, told: Any) -> None:
        self.sent.append(request)
        answer = self._answers.pop(0)(request.id)
        self.loop.call_soon(lambda: told(answer))

    def withdraw(self, request_id: bytes) -> None:
        pass

    def send(self, **options: Any) -> Any:
        return self.driver.send(
            om.Target(topic="t", server="s"), {}, {"method": "m"}, wait_for_reply=True, **options
        )


def test_what_is_busy_is_tried_again(site: Site) -> None:
    busy, done = handed_back(BUSY, "full"), partial(Answered, failed=False, body=b"7")
    script = Scripted(site, [busy, busy, busy, done])
    assert script.send(timeout=PATIENT_S) == 7
    assert len({request.id for request in script.sent}) == 1
    times = [request.timeout_ms for request in script.sent]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


@pytest.mark.parametrize("retry", [0, 2])
def test_busy_for_longer_than_wanted(site: Site, retry: int) -> None:
    script = Scripted(site, [handed_back(BUSY, "full")] * 5)
    with pytest.raises(om.MessageDeliveryFailure, match="full"):
        script.send(retry=retry)
    assert len(script.sent) == retry + 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [(NO_AGENT, om.MessageUndeliverable), (RELEASED, om.MessagingTimeout)],
)
def test_reasons(site: Site, reason: int, kind: type[Exception]) -> None:
    script = Scripted(site, [handed_back(reason, "says the daemon")])
    with pytest.raises(kind, match="says the daemon"):
        script.send()


def test_names_that_are_too_long(site: Site) -> None:
    driver = site.driver(site.host_url)
    for target in (
        om.Target(topic="t" * 256),
        om.Target(topic="t", server="s" * 256),
        om.Target(topic="t", exchange="ä" * 128),
    ):
        with pytest.raises(om.InvalidTarget, match="NAME_BYTES_MAX"):
            driver.send(target, {}, {"method": "m"})
    with pytest.raises(om.MessagingException, match="needs a method"):
        driver.send(om.Target(topic="t"), {}, {})


def test_too_many_topics(site: Site) -> None:
    pairs = [(om.Target(topic=f"t{n}"), "info") for n in range(65)]
    with pytest.raises(om.MessagingException, match="TOPICS_MAX"):
        site.driver(site.host_url).listen_for_notifications(pairs, None, 1, None)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("vchan://", "which socket"),
        ("vchan:///", "vchan:///run/vchan/agent.sock in a guest"),
        ("vchan://host/run/vchan.sock", "no hosts"),
        ("vchan:///run/vchan.sock?timeout=3", "no options: timeout"),
    ],
)
def test_a_wrong_url(url: str, text: str) -> None:
    from oslo_messaging.transport import InvalidTransportURL

    with pytest.raises(InvalidTransportURL, match=text):
        om.get_rpc_transport(conf(), url)


# -------------------------------------------------------------------- notifications


class Sink:
    """A notification endpoint."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.requeue = 0

    def _take(self, priority: str, *what: Any) -> Any:
        if self.requeue:
            self.requeue -= 1
            return om.NotificationResult.REQUEUE
        self.got.append((priority, *what))
        return om.NotificationResult.HANDLED

    def info(self, *what: Any) -> Any:
        return self._take("info", *what)

    def error(self, *what: Any) -> Any:
        return self._take("error", *what)


def notifier(site: Site, url: str, topic: str = "n", driver: str = "messagingv2") -> Any:
    return om.Notifier(
        site.notification_transport(url), publisher_id="tests", driver=driver, topics=[topic]
    )


@pytest.mark.parametrize("where", ["host", "guest"])
def test_notifications_to_the_host(
    site: Site, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a program of the host, and out of the guest."""
    sink = Sink()
    sink.requeue = 1
    site.run_server(
        om.get_notification_listener(
            site.notification_transport(site.host_url),
            [om.Target(topic="n"), om.Target(topic="m")],
            [sink],
            allow_requeue=True,
        )
    )
    url = site.host_url if where == "host" else site.agent_url
    notifier(site, url).info({}, "began", {"n": 1})
    notifier(site, url, "m", "messaging").error({}, "failed", [2])
    assert [(kind, what[2], what[3]) for kind, *what in sink.got] == [
        ("info", "began", {"n": 1}),
        ("error", "failed", [2]),
    ]
    _, _, publisher, _, _, metadata = sink.got[0]
    assert publisher == "tests"
    assert len(metadata["message_id"]) == 36 and metadata["timestamp"]
    notifier(site, url).warn({}, "ignored", {})  # nobody has a method for it
    assert "Could not send notification" in caplog.text  # as the notifier says whatever the driver


def test_notifications_into_the_guest(site: Site) -> None:
    """What the broker brings, an RPC cast of the same names can bring too."""
    sink = Sink()
    site.run_server(
        om.get_notification_listener(
            site.notification_transport(site.agent_url), [om.Target(topic="n")], [sink]
        )
    )
    site.wait_served("n.info")
    args = {
        "publisher_id": "p",
        "event_type": "e",
        "payload": 1,
        "metadata": {"message_id": "m", "timestamp": "t"},
    }
    with Client(str(site.host.path)) as client:
        client.cast("n.info", "info", args, server=VM)
    assert sink.got == [("info", {}, "p", "e", 1, {"message_id": "m", "timestamp": "t"})]


def test_batches(site: Site) -> None:
    batches: list[list[Any]] = []

    class Batch:
        def info(self, messages: list[Any]) -> None:
            batches.append(messages)

    site.run_server(
        om.get_batch_notification_listener(
            site.notification_transport(site.host_url),
            [om.Target(topic="n")],
            [Batch()],
            batch_size=5,
            batch_timeout=1,
        )
    )
    sending = [notifier(site, site.host_url) for _ in range(3)]
    with ThreadPoolExecutor(10) as pool:
        for number in range(10):
            pool.submit(sending[number % 3].info, {}, f"e{number}", {})
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == 10
    assert max(sizes) == 5


# -------------------------------------------------------------------- processes and threads


def test_a_connection_is_touched_by_its_own_thread_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with touches_recorded(monkeypatch) as strays:
        endpoint = Endpoint()
        server = site.serve(site.host_url, endpoint)
        client = site.client(site.host_url, timeout=PATIENT_S)
        assert client.call({}, "echo", n=1) == {"n": 1}
        client.prepare(call_monitor_timeout=PATIENT_S).call({}, "echo")
        client.cast({}, "note", n=2)
        wait(lambda: endpoint.noted == [{"n": 2}])
        site.end_server(server)
    assert strays == []


def test_a_listener_of_the_process_before_a_fork_is_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = site.driver(site.host_url)
    listener = driver.listen(om.Target(topic="t", server="s"), 1, None)._poll_style_listener
    client = site.client(site.host_url, server="s")
    client.prepare(timeout=PATIENT_S)
    with ThreadPoolExecutor() as pool:
        cast = pool.submit(client.cast, {}, "echo")
        (incoming,) = listener.poll(PATIENT_S)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with pytest.raises(base.TransportDriverError, match="before this process was forked"):
                listener.acknowledge(incoming)
        incoming.acknowledge()
        cast.result(PATIENT_S)
    listener.cleanup()


def test_a_call_that_was_withdrawn_before_it_began_is_refused_to_the_server(site: Site) -> None:
    driver = site.driver(site.host_url)
    listener = driver.listen(om.Target(topic="t", server="s"), 1, None)._poll_style_listener
    client = site.client(site.host_url, server="s")
    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.prepare(timeout=0.5).call, {}, "echo")
        (incoming,) = listener.poll(PATIENT_S)
        with pytest.raises(om.MessagingTimeout):
            call.result(PATIENT_S)
    wait(lambda: not listener._handed)
    with pytest.raises(oslo_driver.NotHeld):
        incoming.acknowledge()
    listener.cleanup()


def test_nothing_is_left_behind(site: Site) -> None:
    endpoint = Endpoint()

    def work() -> None:
        transport = om.get_rpc_transport(conf(), site.host_url)
        server = om.get_rpc_server(transport, om.Target(topic="t", server="s"), [endpoint])
        server.start()
        client = site.client(site.host_url, timeout=PATIENT_S)
        client.call({}, "echo")
        client.prepare(call_monitor_timeout=2).call({}, "echo")
        with pytest.raises(om.RemoteError):
            client.prepare(call_monitor_timeout=2).call({}, "missing")
        server.stop()
        server.wait()
        site._transports.pop().cleanup()
        transport.cleanup()

    work()  # what is made once
    wait(lambda: not _watchdogs())
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    for _ in range(3):
        work()
    wait(lambda: threading.active_count() <= threads, lambda: threading.enumerate())
    gc.collect()
    wait(lambda: descriptors() <= files)


def _watchdogs() -> list[threading.Thread]:
    """The dispatcher's threads that send heartbeats."""
    return [thread for thread in threading.enumerate() if "_watchdog" in thread.name]


def test_a_process_that_forks(site: Site) -> None:
    """Services make their transport first and then fork their workers."""
    site.serve(site.host_url, Endpoint())
    program = f"""
from tests.unit.oslo_site import om, conf
import os, sys
transport = om.get_rpc_transport(conf(), "{site.host_url}")
make = getattr(om, "get_rpc_client", om.RPCClient)
client = make(transport, om.Target(topic="t"), timeout=30)
assert client.call({{}}, "echo", n=1) == {{"n": 1}}
children = []
for child in range(2):
    pid = os.fork()
    if not pid:
        for n in range(20):
            assert client.call({{}}, "echo", n=n) == {{"n": n}}
        transport.cleanup()
        os._exit(7)
    children.append(pid)
for n in range(20):
    assert client.call({{}}, "echo", n=n) == {{"n": n}}
for pid in children:
    assert os.waitpid(pid, 0)[1] == 7 << 8
assert client.call({{}}, "echo", n=1) == {{"n": 1}}
transport.cleanup()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_transport_that_is_cleaned_up_under_a_caller(site: Site) -> None:
    site.serve(site.host_url, Endpoint())
    client = site.client(site.host_url, timeout=PATIENT_S)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.call, {}, "sleep", seconds=1)
        wait(lambda: len(site.host.local._servers) == 1)
        site._transports[-1].cleanup()
        with pytest.raises(om.MessageDeliveryFailure, match="closed"):
            waiting.result(PATIENT_S)


def test_the_package_announces_the_driver() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="oslo.messaging.drivers", name="vchan")
    assert found.load() is oslo_driver.VchanDriver
    assert issubclass(oslo_driver.VchanDriver, base.BaseDriver)


def test_only_what_the_guest_has_is_imported() -> None:
    """Beside oslo.messaging: no library but those that it brings."""
    source = (ROOT / "vchan" / "oslo_driver.py").read_text()
    lines = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    known = ("oslo_messaging", "oslo_serialization", "oslo_utils", "vchan", "__future__")
    others = {line.split()[1].partition(".")[0] for line in lines} - set(known)
    assert others <= set(sys.stdlib_module_names)
    assert Path(oslo_driver.__file__).name == "oslo_driver.py"


def test_an_exception_that_cannot_say_what_it_is() -> None:
    class Wordless(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    from vchan.oslo_driver import _failure_body

    def fail() -> None:
        raise Wordless

    try:
        fail()
    except Wordless:
        failure = json.loads(_failure_body(sys.exc_info()))
    assert failure["class"] == "Wordless"
    assert failure["message"] == "(its __str__ raised ValueError)"
    assert any("raise Wordless" in line for line in failure["tb"])
