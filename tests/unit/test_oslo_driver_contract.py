"""oslo.messaging's contract with its drivers, sentence by sentence.

Each test quotes the sentence of oslo_messaging/_drivers/base.py that it checks. Where the driver
does otherwise on purpose, the test says so and why; docs/oslo.md lists these.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.oslo_site import Site, base, descriptors, made_site, om, oslo_driver, wait

PATIENT_S = 30.0
SHORT_S = 0.2


@pytest.fixture
def site() -> Iterator[Site]:
    with made_site() as site:
        yield site


class Received:
    """A listener of the driver's, and what it was given."""

    def __init__(
        self, listener: Any, treat: Callable[[Any], object] = lambda message: message.acknowledge()
    ) -> None:
        self.listener = listener
        self.batches: list[list[Any]] = []
        self._treat = treat
        listener.start(self._take)

    def _take(self, batch: list[Any]) -> None:
        self.batches.append(batch)
        for message in batch:
            self._treat(message)

    @property
    def messages(self) -> list[Any]:
        return [message for batch in self.batches for message in batch]

    def wait(self, count: int) -> list[Any]:
        wait(lambda: len(self.messages) >= count, lambda: self.messages)
        return self.messages

    def end(self) -> None:
        self.listener.stop()
        self.listener.cleanup()


@pytest.fixture
def rpc(site: Site) -> Iterator[Callable[..., Received]]:
    """Listens for RPC."""
    with _listening(site, lambda driver, target: driver.listen(target, 1, None)) as listen:
        yield listen


@pytest.fixture
def notifications(site: Site) -> Iterator[Callable[..., Received]]:
    """Listens for notifications of priority info."""
    with _listening(
        site,
        lambda driver, target: driver.listen_for_notifications([(target, "info")], None, 1, None),
    ) as listen:
        yield listen


class _listening:  # noqa: N801 - used as a function
    def __init__(self, site: Site, make: Callable[[Any, Any], Any]) -> None:
        self._site, self._make = site, make
        self._all: list[Received] = []

    def __enter__(self) -> Callable[..., Received]:
        return self._listen

    def _listen(
        self, target: Any, treat: Callable[[Any], object] = lambda message: message.acknowledge()
    ) -> Received:
        received = Received(self._make(self._site.driver(self._site.host_url), target), treat)
        self._all.append(received)
        return received

    def __exit__(self, *_: object) -> None:
        for received in self._all:
            received.end()


def target(topic: str = "t", **more: Any) -> Any:
    return om.Target(topic=topic, exchange=more.pop("exchange", "e"), **more)


def message(method: str = "work", **args: Any) -> dict[str, Any]:
    return {"method": method, "args": args}


def event(number: int = 0) -> dict[str, Any]:
    return {
        "message_id": f"id-{number}",
        "publisher_id": "host.tests",
        "event_type": "tested",
        "priority": "INFO",
        "payload": {"number": number},
        "timestamp": "2026-01-01 00:00:00.000000",
    }


def poller(site: Site, to: Any, batch_size: int = 1) -> Any:
    """A listener without the thread that polls it."""
    adapter = site.driver(site.host_url).listen(to, batch_size, None)
    return adapter._poll_style_listener


class Casting:
    """Casts from threads of its own: a cast ends when the server has acknowledged."""

    def __init__(self, site: Site, to: Any) -> None:
        self._driver, self._to = site.driver(site.host_url), to
        self._pool = ThreadPoolExecutor(64)

    def __call__(self, count: int) -> list[Any]:
        return [
            self._pool.submit(self._driver.send, self._to, {}, message(n=n)) for n in range(count)
        ]

    def __enter__(self) -> Casting:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


# -------------------------------------------------------------------- IncomingMessage


def test_ctxt_and_message_are_those_of_the_sender(site: Site, rpc: Any) -> None:
    """ctxt: "Context metadata provided by sending application."
    message: "The message as provided by the sending application."
    """
    received = rpc(target(server="s"))
    sent = {"method": "work", "args": {"x": [1, None, "ä"]}, "namespace": "n", "version": "1.7"}
    site.driver(site.host_url).send(target(), {"user": "u", "roles": ["a"]}, dict(sent))
    (got,) = received.wait(1)
    assert got.ctxt == {"user": "u", "roles": ["a"]}
    assert got.message == sent
    assert got.msg_id


def test_acknowledge_notifies_the_backend(site: Site, rpc: Any) -> None:
    """ "When this is called the driver must notify the backend of the acknowledgment." """
    received = rpc(target(server="s"), lambda _: None)
    with Casting(site, target()) as cast:
        (sent,) = cast(1)
        (got,) = received.wait(1)
        time.sleep(SHORT_S)
        assert not sent.done()
        got.acknowledge()
        sent.result(PATIENT_S)


def test_acknowledge_blocks_until_it_is_processed_locally(site: Site, rpc: Any) -> None:
    """ "This call should block at least until the driver has processed the acknowledgment request
    locally."
    """
    received = rpc(target(server="s"), lambda _: None)
    with Casting(site, target()) as cast:
        cast(1)
        (got,) = received.wait(1)
        responder = received.listener._poll_style_listener._connection.responder
        assert got.request.id in responder
        got.acknowledge()
        assert got.request.id not in responder


def test_a_failed_acknowledge_of_a_notification_is_logged_and_raises_nothing(
    site: Site, notifications: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """ "If the acknowledge operation fails this method must issue a log message describing the
    reason for the failure. :raises: Does not raise an exception"
    """
    received = notifications(target(), lambda _: None)
    with ThreadPoolExecutor() as pool:
        sending = site.driver(site.host_url)
        pool.submit(sending.send_notification, target("t.info"), {}, event(), 2.0)
        (got,) = received.wait(1)
        received.listener._poll_style_listener.cleanup()
        with caplog.at_level(logging.WARNING):
            got.acknowledge()
        assert "no longer ours" in caplog.text
        sending.cleanup()


def test_what_was_withdrawn_must_not_run(site: Site, rpc: Any) -> None:
    """ ":raises: Does not raise an exception". Ours does for RPC: the server begins to work when
    this returns, and a message that another server has by then would run twice. oslo.messaging's
    RPCServer is prepared for it: "Can not acknowledge message. Skip processing".
    """
    received = rpc(target(server="s"), lambda _: None)
    with Casting(site, target()) as cast:
        (sent,) = cast(1)
        (got,) = received.wait(1)
        site.host.drop_peers()  # the server's connection, too: it is given the cast anew
        (_, again) = received.wait(2)
        with pytest.raises(oslo_driver.NotHeld):
            got.acknowledge()
        again.acknowledge()
        sent.result(PATIENT_S)


@pytest.mark.parametrize("kind", ["rpc", "notifications"])
def test_requeue_returns_it_for_another_server(
    site: Site, kind: str, request: pytest.FixtureRequest
) -> None:
    """ "Called by the server to return the message to the backend so it may be made available for
    consumption by another server."
    """
    listen = request.getfixturevalue(kind)
    first = listen(target(server="s"), lambda got: got.requeue())
    with ThreadPoolExecutor() as pool:
        driver = site.driver(site.host_url)
        if kind == "rpc":
            sent = pool.submit(driver.send, target(), {}, message())
        else:
            sent = pool.submit(driver.send_notification, target("t.info"), {}, event(), 2.0)
        first.wait(1)
        second = listen(target(server="s2"))
        second.wait(1)
        sent.result(PATIENT_S)


def test_requeue_blocks_until_it_is_processed_locally(site: Site, rpc: Any) -> None:
    """ "This call should block at least until the driver has processed the requeue request
    locally."
    """
    received = rpc(target(server="s"), lambda _: None)
    with Casting(site, target()) as cast:
        (sent,) = cast(1)
        (got,) = received.wait(1)
        responder = received.listener._poll_style_listener._connection.responder
        got.requeue()
        # Gone, unless it has come again already.
        assert got.request.id not in responder or len(received.messages) > 1
        received.wait(2)[1].acknowledge()
        sent.result(PATIENT_S)


def test_a_failed_requeue_is_logged_and_raises_nothing(
    site: Site, rpc: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "If the requeue operation fails this method must issue a log message describing the reason
    for the failure. :raises: Does not raise an exception"
    """
    monkeypatch.setattr("vchan.rpc.dispatcher.LINGER_S", 0.1)
    received = rpc(target(server="s"), lambda _: None)
    with Casting(site, target()) as cast:
        (sent,) = cast(1)
        (got,) = received.wait(1)
        with caplog.at_level(logging.WARNING):
            received.listener._poll_style_listener._engine.close()
            got.requeue()
        assert "cannot requeue" in caplog.text
        with pytest.raises(om.MessageDeliveryFailure):
            sent.result(PATIENT_S)


def test_requeue_is_supported(site: Site) -> None:
    """ "The require_features method should indicate whether or not support for requeue is
    available." and "The driver must raise a 'NotImplementedError' if any of the feature flags
    passed as True are not supported."
    """
    site.driver(site.host_url).require_features(requeue=True)


# -------------------------------------------------------------------- RpcIncomingMessage


def test_reply_reaches_the_caller(site: Site, rpc: Any) -> None:
    """ "Called by the server to send an RPC reply message [...] back to the calling client." """
    rpc(target(server="s"), lambda got: got.reply({"answer": got.message["args"]["x"]}))
    driver = site.driver(site.host_url)
    assert driver.send(target(), {}, message(x=7), wait_for_reply=True) == {"answer": 7}


def test_an_exception_is_converted_and_back(site: Site, rpc: Any) -> None:
    """ "If an exception is passed via *failure* the driver must convert it to a form that can be
    sent as a message and properly converted back to the exception at the remote."
    """

    def fail(got: Any) -> None:
        error = LookupError("lost", 3)
        got.reply(failure=(LookupError, error, None))

    rpc(target(server="s"), fail)
    with pytest.raises(LookupError) as raised:
        site.driver(site.host_url).send(target(), {}, message(), wait_for_reply=True)
    assert raised.value.args[1] == 3
    assert "lost" in str(raised.value)


def test_each_reply_reaches_its_own_caller(site: Site, rpc: Any) -> None:
    """ "Often a driver will also need to set a correlation identifier in the reply to help the
    remote route the reply to the correct RPCClient."
    """
    held: list[Any] = []
    rpc(target(server="s"), held.append)
    drivers = [site.driver(site.host_url) for _ in range(3)]
    with ThreadPoolExecutor(30) as pool:
        sent = [
            pool.submit(drivers[n % 3].send, target(), {}, message(n=n), wait_for_reply=True)
            for n in range(30)
        ]
        wait(lambda: len(held) == 30)
        for got in reversed(held):
            got.reply(got.message["args"]["n"])
        assert [one.result(PATIENT_S) for one in sent] == list(range(30))


def test_a_reply_is_delivered_at_most_once(
    site: Site, rpc: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """ "The driver should provide an *at-most-once* delivery guarantee for reply messages." """

    def twice(got: Any) -> None:
        got.reply("first")
        got.reply("second")

    rpc(target(server="s"), twice)
    driver = site.driver(site.host_url)
    with caplog.at_level(logging.INFO, "vchan.oslo_driver"):
        for _ in range(3):
            assert driver.send(target(), {}, message(), wait_for_reply=True) == "first"
        wait(lambda: caplog.text.count("nobody waits") == 3)


def test_reply_blocks_until_it_is_handed_over(site: Site, rpc: Any) -> None:
    """ "This call should block at least until the reply message has been handed off to the
    backend".
    """
    handed_over = []

    def answer(got: Any) -> None:
        responder = got._listener._connection.responder
        got.reply(1)
        handed_over.append(got.request.id not in responder)

    rpc(target(server="s"), answer)
    site.driver(site.host_url).send(target(), {}, message(), wait_for_reply=True)
    wait(lambda: handed_over == [True])


def test_a_failed_reply_is_logged_and_raises_nothing(
    site: Site, rpc: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """ "If the reply operation fails this method must issue a log message describing the reason for
    the failure. :raises: Does not raise an exception"
    """
    received = rpc(target(server="s"), lambda _: None)
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(
            site.driver(site.host_url).send, target(), {}, message(), wait_for_reply=True
        )
        (got,) = received.wait(1)
        received.listener._poll_style_listener._engine.close()
        with caplog.at_level(logging.WARNING):
            got.reply(1)
        assert "cannot reply" in caplog.text
        with pytest.raises(om.MessagingTimeout, match="went away"):
            sent.result(PATIENT_S)


def test_a_heartbeat_updates_the_clients_timer(site: Site, rpc: Any) -> None:
    """ "If the client [...] passed its timeout value during the RPC call, this method will be
    called periodically by the server to update the client's timeout timer while a long-running call
    is executing."
    """

    def work(got: Any) -> None:
        assert got.client_timeout == 3
        for _ in range(8):
            time.sleep(0.5)
            got.heartbeat()
        got.reply("done")

    rpc(target(server="s"), work)
    result = site.driver(site.host_url).send(
        target(), {}, message(), wait_for_reply=True, timeout=60, call_monitor_timeout=3
    )
    assert result == "done"


def test_a_heartbeat_for_nobody_ends_who_sends_them(site: Site, rpc: Any) -> None:
    """ ":raises: Does not raise an exception". Ours does when nobody waits any more, as RabbitMQ's
    does when it cannot send: it is what ends the dispatcher's thread that sends heartbeats, which
    would else go on for ever after a call of a method that is not there.
    """
    received = rpc(target(server="s"), lambda got: got.reply(1))
    site.driver(site.host_url).send(target(), {}, message(), wait_for_reply=True)
    with pytest.raises(oslo_driver.NotHeld):
        received.messages[0].heartbeat()


# -------------------------------------------------------------------- PollStyleListener


def test_poll_blocks_until_there_is_a_message(site: Site) -> None:
    """ "It blocks until 'batch_size' incoming messages are available [...]" """
    listener = poller(site, target(server="s"))
    with Casting(site, target()) as cast, ThreadPoolExecutor() as pool:
        polled = pool.submit(listener.poll)
        time.sleep(SHORT_S)
        assert not polled.done()
        cast(1)
        (got,) = polled.result(PATIENT_S)
        got.acknowledge()
    listener.cleanup()


def test_poll_blocks_up_to_timeout(site: Site) -> None:
    """ "[...] a timeout occurs [...]"; timeout: "Block up to 'timeout' seconds waiting for a
    message".
    """
    listener = poller(site, target(server="s"))
    began_s = time.monotonic()
    assert listener.poll(timeout=SHORT_S) == []
    assert time.monotonic() - began_s >= SHORT_S
    listener.cleanup()


def test_poll_is_interrupted_by_stop(site: Site) -> None:
    """ "[...] or the poll is interrupted by a call to the stop method." and "This method is called
    from a different thread than the poller so it must be thread-safe."
    """
    listener = poller(site, target(server="s"))
    with ThreadPoolExecutor() as pool:
        polled = pool.submit(listener.poll)
        time.sleep(SHORT_S)
        listener.stop()
        assert polled.result(PATIENT_S) == []
    listener.cleanup()


def test_stop_makes_poll_return_what_is_available(site: Site) -> None:
    """ "This method must cause the poll call to unblock and return whatever messages are currently
    available."
    """
    listener = poller(site, target(server="s"), batch_size=10)
    with Casting(site, target()) as cast, ThreadPoolExecutor() as pool:
        cast(3)
        wait(lambda: len(listener._queue) == 3)
        polled = pool.submit(listener.poll, None, 10, None)
        time.sleep(SHORT_S)
        assert not polled.done()
        listener.stop()
        batch = polled.result(PATIENT_S)
        assert len(batch) == 3
        for got in batch:
            got.acknowledge()
    assert listener.poll(timeout=SHORT_S) == []
    listener.cleanup()


def test_poll_waits_for_a_full_batch(site: Site) -> None:
    """ "If 'batch_size' is > 1 poll must block until 'batch_size' messages are available [...]" """
    listener = poller(site, target(server="s"), batch_size=3)
    with Casting(site, target()) as cast, ThreadPoolExecutor() as pool:
        polled = pool.submit(listener.poll, None, 3, PATIENT_S)
        cast(2)
        wait(lambda: len(listener._queue) == 2)
        assert not polled.done()
        cast(1)
        batch = polled.result(PATIENT_S)
        assert len(batch) == 3
        for got in batch:
            got.acknowledge()
    listener.cleanup()


def test_poll_gives_what_it_has_when_the_batch_timeout_expires(site: Site) -> None:
    """ "[...] or at least one message is available and batch_timeout expires" and "If a full
    batch's worth of messages is not received when the timer expires then poll returns all messages
    received thus far."
    """
    listener = poller(site, target(server="s"), batch_size=3)
    with Casting(site, target()) as cast:
        cast(2)
        wait(lambda: len(listener._queue) == 2)
        batch = listener.poll(None, 3, SHORT_S)
        assert len(batch) == 2
        for got in batch:
            got.acknowledge()
    listener.cleanup()


def test_the_batch_timer_begins_with_the_first_message(site: Site) -> None:
    """ "A timer is started when the first message in a batch is received." """
    listener = poller(site, target(server="s"), batch_size=3)
    with Casting(site, target()) as cast, ThreadPoolExecutor() as pool:
        polled = pool.submit(listener.poll, None, 3, SHORT_S)
        time.sleep(3 * SHORT_S)
        assert not polled.done()  # without a first message it does not run
        cast(1)
        (got,) = polled.result(PATIENT_S)
        got.acknowledge()
    listener.cleanup()


def test_poll_returns_at_most_batch_size(site: Site) -> None:
    """ ":return: A list of up to batch_size IncomingMessage objects." """
    listener = poller(site, target(server="s"), batch_size=2)
    with Casting(site, target()) as cast:
        cast(5)
        wait(lambda: len(listener._queue) == 5)
        sizes: list[int] = []
        while sum(sizes) < 5:
            batch = listener.poll(1.0, 2, SHORT_S)
            sizes.append(len(batch))
            for got in batch:
                assert isinstance(got, base.IncomingMessage)
                got.acknowledge()
        assert sizes == [2, 2, 1]
    listener.cleanup()


def test_no_more_than_prefetch_is_handed_out_unacknowledged(site: Site) -> None:
    """prefetch_size: "The number of messages that should be pulled from the backend per receive
    transaction."
    """
    listener = poller(site, target(server="s"))
    listener.prefetch_size = 4
    with Casting(site, target()) as cast:
        cast(10)
        wait(lambda: len(listener._queue) == 10)
        held = [listener.poll(1.0)[0] for _ in range(4)]
        assert listener.poll(SHORT_S) == []
        held.pop().acknowledge()
        held += listener.poll(1.0)
        assert len(held) == 4
        assert listener.poll(SHORT_S) == []
        while held:
            held.pop().acknowledge()
            held += listener.poll(0.0)
        assert not listener._queue
    listener.cleanup()


def test_cleanup_of_a_listener_frees_everything_and_blocks_until_then(site: Site) -> None:
    """ "Cleanup all resources held by the listener. This method should block until the cleanup is
    completed."
    """
    driver = site.driver(site.host_url)
    driver.listen(target(server="s"), 1, None).cleanup()  # the driver's own thread stays
    threads, files = set(threading.enumerate()), descriptors()
    for number in range(5):
        received = Received(driver.listen(target(server=f"s{number}"), 1, None))
        received.end()
    assert set(threading.enumerate()) <= threads
    # The other ends are the host's, which notices a moment later.
    wait(lambda: descriptors() <= files)


# -------------------------------------------------------------------- Listener


def test_start_hands_messages_to_the_callback(site: Site, rpc: Any) -> None:
    """ "When message(s) arrive the driver must invoke 'on_incoming_callback' passing it the
    received messages as a list of IncomingMessages."
    """
    received = rpc(target(server="s"))
    driver = site.driver(site.host_url)
    for number in range(3):
        driver.send(target(), {}, message(n=number))
    received.wait(3)
    assert [len(batch) for batch in received.batches] == [1, 1, 1]
    assert [got.message["args"]["n"] for got in received.messages] == [0, 1, 2]


def test_after_stop_the_callback_is_not_invoked(site: Site, rpc: Any) -> None:
    """ "Stop receiving messages. The driver must no longer invoke the callback." """
    received = rpc(target(server="s"))
    driver = site.driver(site.host_url)
    driver.send(target(), {}, message())
    received.listener.stop()
    with pytest.raises(om.MessageUndeliverable):
        driver.send(target(), {}, message())
    assert len(received.messages) == 1


# -------------------------------------------------------------------- BaseDriver: sending


def test_the_default_exchange(site: Site) -> None:
    """default_exchange: "The exchange to use if no exchange is specified in a Target." """
    listening = site.driver(site.host_url, default_exchange="mine")
    received = Received(listening.listen(om.Target(topic="t", server="s"), 1, None))
    site.driver(site.host_url).send(om.Target(topic="t", exchange="mine"), {}, message())
    site.driver(site.host_url, default_exchange="mine").send(om.Target(topic="t"), {}, message())
    with pytest.raises(om.MessageUndeliverable):
        site.driver(site.host_url, default_exchange="other").send(
            om.Target(topic="t"), {}, message()
        )
    received.wait(2)
    received.end()


class Fault(Exception):
    """One that callers may or may not allow."""

    def __init__(self, text: str, *, code: int = 0) -> None:
        super().__init__(text)
        self.kwargs = {"code": code}
        self.code = code


def break_down() -> None:
    raise Fault("broken", code=7)


@pytest.mark.parametrize("allowed", [True, False])
def test_allowed_remote_exmods(site: Site, rpc: Any, allowed: bool) -> None:
    """allowed_remote_exmods: "whitelist of those exception modules which are permitted to be
    re-raised if an exception is returned in response to an RPC call."
    """

    def fail(got: Any) -> None:
        try:
            break_down()
        except Fault as error:
            got.reply(failure=(Fault, error, error.__traceback__))

    rpc(target(server="s"), fail)
    driver = site.driver(site.host_url, allowed_remote_exmods=[__name__] if allowed else [])
    with pytest.raises(Fault if allowed else om.RemoteError) as raised:
        driver.send(target(), {}, message(), wait_for_reply=True)
    error: Any = raised.value
    assert 'raise Fault("broken", code=7)' in str(error)  # the server's traceback
    if allowed:
        assert (error.args, error.kwargs, error.code) == (("broken",), {"code": 7}, 7)
    else:
        assert (error.exc_type, error.value) == ("Fault", "broken")


@pytest.mark.parametrize(
    ("to", "reached"),
    [
        (target(), True),
        (target(server="s"), True),
        (target(server="other"), False),
        (target(exchange="other"), False),
        (target("other"), False),
        (target(server="s", exchange="other"), False),
    ],
)
def test_the_address_is_topic_exchange_and_server(
    site: Site, rpc: Any, to: Any, reached: bool
) -> None:
    """ "The driver must use the *topic*, *exchange*, and *server* (if present) attributes of the
    *target* to construct the backend-native message address. The message address must match the
    format used by subscription(s) created by the listen method."
    """
    received = rpc(target(server="s"))
    driver = site.driver(site.host_url)
    if reached:
        driver.send(to, {}, message())
        received.wait(1)
    else:
        with pytest.raises(om.MessageUndeliverable):
            driver.send(to, {}, message())
        assert received.messages == []


def test_fanout_reaches_all(site: Site, rpc: Any) -> None:
    """ "If the *target's* *fanout* attribute is set, a copy of the message must be sent to all
    subscriptions using the *exchange* and *topic* values."
    """
    servers = [rpc(target(server=f"s{n}")) for n in range(3)]
    others = [rpc(target("u", server="s0")), rpc(target(server="s0", exchange="f"))]
    driver = site.driver(site.host_url)
    for number in range(5):
        driver.send(target(fanout=True), {}, message(n=number))
    for received in servers:
        got = [got.message["args"]["n"] for got in received.wait(5)]
        assert got == [0, 1, 2, 3, 4]
    assert [received.messages for received in others] == [[], []]


def test_without_fanout_one_receives_it_and_all_have_their_turns(site: Site, rpc: Any) -> None:
    """ "If *fanout* is not set, then only one subscriber should receive the message." and "the
    driver should implement a delivery pattern that distributes messages in a balanced fashion
    across the multiple subscribers."
    """
    servers = [rpc(target(server=f"s{n}")) for n in range(3)]
    driver = site.driver(site.host_url)
    for number in range(30):
        driver.send(target(), {}, message(n=number))
    assert [len(received.messages) for received in servers] == [10, 10, 10]
    counts = Counter(got.message["args"]["n"] for each in servers for got in each.messages)
    assert counts == Counter(range(30))


def test_with_a_server_only_that_one_receives_it(site: Site, rpc: Any) -> None:
    """ "In the case of multiple subscribers to the same address, only one copy of the message is
    delivered."
    """
    servers = [rpc(target(server=f"s{n}")) for n in range(3)]
    driver = site.driver(site.host_url)
    for _ in range(5):
        driver.send(target(server="s1"), {}, message())
    assert [len(received.messages) for received in servers] == [0, 5, 0]


def test_send_blocks_until_the_response(site: Site, rpc: Any) -> None:
    """ "If True, this method must block until a response message is received. This method then
    returns the response message to the caller."
    """
    received = rpc(target(server="s"), lambda _: None)
    with ThreadPoolExecutor() as pool:
        driver = site.driver(site.host_url)
        sent = pool.submit(driver.send, target(), {}, message(), wait_for_reply=True)
        (got,) = received.wait(1)
        got.acknowledge()
        time.sleep(SHORT_S)
        assert not sent.done()
        got.reply([1, {"a": None}])
        assert sent.result(PATIENT_S) == [1, {"a": None}]


def test_send_blocks_until_the_message_is_handed_over(site: Site, rpc: Any) -> None:
    """ "If *wait_for_reply* is False this method will block until the message has been handed off
    to the backend [...] Once the handoff completes this method returns." and ":returns: A reply
    message or None if no reply expected".
    """
    rpc(target(server="s"))
    assert site.driver(site.host_url).send(target(), {}, message()) is None


def test_timeout(site: Site, rpc: Any) -> None:
    """timeout: "Maximum time in seconds to block waiting for the send operation to complete. Should
    this expire the send must raise a MessagingTimeout exception".
    """
    rpc(target(server="s"), lambda _: None)
    driver = site.driver(site.host_url)
    for wait_for_reply in (True, False):
        began_s = time.monotonic()
        with pytest.raises(om.MessagingTimeout, match="Timed out waiting for"):
            driver.send(target(), {}, message(), wait_for_reply=wait_for_reply, timeout=SHORT_S)
        assert time.monotonic() - began_s > SHORT_S - 0.02


def test_call_monitor_timeout(site: Site, rpc: Any) -> None:
    """call_monitor_timeout: "Maximum time the client will wait for the call to complete or receive
    a message heartbeat indicating the remote side is still executing."
    """
    rpc(target(server="s"), lambda got: got.acknowledge())
    began_s = time.monotonic()
    with pytest.raises(om.MessagingTimeout):
        site.driver(site.host_url).send(
            target(), {}, message(), wait_for_reply=True, timeout=600, call_monitor_timeout=1
        )
    assert 1.0 <= time.monotonic() - began_s < 300


@pytest.mark.parametrize("retry", [0, 1, 3])
def test_retry_of_a_daemon_that_is_not_there(site: Site, retry: int) -> None:
    """ "The *retry* parameter specifies how many attempts to re-send the message the driver may
    make before raising a MessageDeliveryFailure exception." and "0 means no retry is attempted. N
    means attempt at most N retries before failing."
    """
    site.host.down()
    driver = site.driver(site.host_url)
    with pytest.raises(om.MessageDeliveryFailure, match=r"is vchan-host running\?|no such socket"):
        driver.send(target(), {}, message(), retry=retry)
    with pytest.raises(om.MessageDeliveryFailure):
        driver.send_notification(target("t.info"), {}, event(), 2.0, retry=retry)


@pytest.mark.parametrize("retry", [None, -1])
def test_unlimited_retry(site: Site, rpc: Any, retry: int | None) -> None:
    """ "A value of None or -1 means unlimited retries." """
    received = rpc(target(server="s"))
    site.host.down()
    with ThreadPoolExecutor() as pool:
        driver = site.driver(site.host_url)
        sent = pool.submit(driver.send, target(), {}, message(), retry=retry)
        time.sleep(3 * SHORT_S)
        assert not sent.done()
        site.host.up()
        sent.result(PATIENT_S)
        received.wait(1)


def test_a_retry_duplicates_nothing(site: Site, rpc: Any) -> None:
    """ "**Note well:** the driver MUST guarantee that the message is not duplicated by the retry
    process."
    """
    acknowledged: list[int] = []

    def run(got: Any) -> None:
        try:
            got.acknowledge()
        except oslo_driver.NotHeld:
            return
        acknowledged.append(got.message["args"]["n"])

    rpc(target(server="s"), run)
    driver = site.driver(site.host_url)

    def disturb() -> None:
        for _ in range(8):
            reached = len(acknowledged) + 5
            wait(lambda reached=reached: len(acknowledged) >= reached)  # type: ignore[misc]
            site.host.drop_peers()

    with ThreadPoolExecutor() as pool:
        disturbing = pool.submit(disturb)
        sent = 0
        while not disturbing.done():  # how many are acknowledged between two disturbances is chance
            driver.send(target(), {}, message(n=sent))
            sent += 1
        disturbing.result()
    # The sender is released by the acknowledgement, a moment before `run` has noted it.
    wait(lambda: len(acknowledged) >= sent, lambda: acknowledged)
    assert acknowledged == list(range(sent))


# -------------------------------------------------------------------- BaseDriver: notifications


def test_send_notification_blocks_until_it_is_accepted(site: Site, notifications: Any) -> None:
    """ "Therefore this method must block at least until the backend accepts ownership of the
    message." On a host's socket there is no store: who accepts it is the listener.
    """
    received = notifications(target(), lambda _: None)
    with ThreadPoolExecutor() as pool:
        driver = site.driver(site.host_url)
        sent = pool.submit(driver.send_notification, target("t.info"), {"u": 1}, event(), 2.0)
        (got,) = received.wait(1)
        assert (got.message, got.ctxt) == (event(), {"u": 1})
        time.sleep(SHORT_S)
        assert not sent.done()
        got.acknowledge()
        assert sent.result(PATIENT_S) is None


def test_a_notification_without_a_listener(site: Site, notifications: Any) -> None:
    """ "The driver must allow for delivery in the case where the intended recipient is not present
    at the time the notification is published." Ours does in a guest, where the control side's
    broker stores it. On a host's socket there is no store, and the notifier is told at once.
    """
    notifications(target("other"))
    driver = site.driver(site.host_url)
    with pytest.raises(om.MessageUndeliverable, match="no program on this host serves topic e/t"):
        driver.send_notification(target("t.info"), {}, event(), 2.0)


def test_one_copy_of_a_notification_to_each_in_turn(site: Site, notifications: Any) -> None:
    """ "Only one copy of the message is delivered in the case of multiple subscribers to the same
    address. In this case the driver should implement a delivery pattern that distributes messages
    in a balanced fashion across the multiple subscribers."
    """
    listeners = [notifications(target()) for _ in range(3)]
    driver = site.driver(site.host_url)
    for number in range(12):
        driver.send_notification(target("t.info"), {}, event(number), 2.0)
    assert [len(received.messages) for received in listeners] == [4, 4, 4]


@pytest.mark.parametrize("version", [1.0, 2.0])
def test_the_version_of_the_envelope(site: Site, notifications: Any, version: float) -> None:
    """ "*version* indicates whether or not the message should be encapsulated in an envelope." The
    listener sees the same either way; there is no envelope on vchan://.
    """
    received = notifications(target())
    site.driver(site.host_url).send_notification(target("t.info"), {}, event(), version)
    assert received.wait(1)[0].message == event()


def test_a_notification_needs_a_priority(site: Site) -> None:
    """ "This format ["%s.%s" % (target.topic, priority)] is used by the caller of the
    send_notification when setting the topic member of the target parameter."
    """
    with pytest.raises(om.InvalidTarget, match=r"TOPIC\.PRIORITY"):
        site.driver(site.host_url).send_notification(target("notopic"), {}, event(), 2.0)


# -------------------------------------------------------------------- BaseDriver: listening


def test_listen_subscribes_to_topic_and_to_server(site: Site, rpc: Any) -> None:
    """ "all messages sent to the exchange and topic given in the target. This includes messages
    sent using a fanout pattern" and "if the server attribute of the target is set then the driver
    must also subscribe to messages sent to the exchange, topic, and server".
    """
    received = rpc(target(server="my-server"))
    driver = site.driver(site.host_url)
    for to in (target(), target(fanout=True), target(server="my-server")):
        driver.send(to, {}, message())
    received.wait(3)


def test_listen_blocks_until_the_subscription_is_there(site: Site) -> None:
    """ "This method only blocks long enough to establish the subscription(s) and construct the
    listener."
    """
    driver, sender = site.driver(site.host_url), site.driver(site.host_url)
    with pytest.raises(om.MessageUndeliverable):
        sender.send(target("none"), {}, message())  # it is connected
    for number in range(20):
        listener = driver.listen(target(f"t{number}", server="s"), 1, None)
        received = Received(listener)
        sender.send(target(f"t{number}", server="s"), {}, message(), timeout=PATIENT_S)
        received.end()


def test_subscriptions_are_restored(site: Site, rpc: Any) -> None:
    """ "In the case of failover, the driver must restore the subscription(s)." """
    received = rpc(target(server="s"))
    driver = site.driver(site.host_url)
    for number in range(2):
        site.host.down()
        site.host.up()
        driver.send(target(), {}, message(n=number))
        driver.send(target(server="s"), {}, message(n=number))
    received.wait(4)


def test_subscriptions_stay_until_the_listener_is_stopped(site: Site, rpc: Any) -> None:
    """ "Subscriptions should remain active until the listener is stopped." """
    received = rpc(target(server="s"))
    driver = site.driver(site.host_url)
    time.sleep(1.0)
    driver.send(target(server="s"), {}, message())
    received.wait(1)
    received.listener.stop()
    with pytest.raises(om.MessageUndeliverable):
        driver.send(target(server="s"), {}, message())


def test_a_subscription_for_each_target_and_priority(site: Site) -> None:
    """ "The driver must create a subscription for each (*target*, *priority*) pair. The topic for
    the subscription is created for each pair using the format "%s.%s" % (target.topic, priority)."
    """
    pairs = [(target("a"), "info"), (target("a"), "error"), (target("b"), "info")]
    listener = site.driver(site.host_url).listen_for_notifications(pairs, None, 1, None)
    received = Received(listener)
    driver = site.driver(site.host_url)
    for topic in ("a.info", "a.error", "b.info"):
        driver.send_notification(target(topic), {}, event(), 2.0)
    received.wait(3)
    for topic in ("b.error", "a.debug", "c.info"):
        with pytest.raises(om.MessageUndeliverable):
            driver.send_notification(target(topic), {}, event(), 2.0)
    received.end()


def test_server_and_fanout_are_ignored_for_notifications(site: Site, notifications: Any) -> None:
    """ "Only the *exchange* and *topic* must be considered when creating subscriptions. *server*
    and *fanout* must be ignored."
    """
    received = notifications(target(server="s", fanout=True))
    other = notifications(target(exchange="other"))
    driver = site.driver(site.host_url)
    driver.send_notification(target("t.info"), {}, event(), 2.0)
    driver.send_notification(target("t.info", server="elsewhere", fanout=True), {}, event(), 2.0)
    received.wait(2)
    assert other.messages == []


def test_pools_are_not_supported(site: Site) -> None:
    """ "The driver must raise a NotImplementedError if pooling is not supported and a pool
    identifier is passed in."
    """
    with pytest.raises(NotImplementedError):
        site.driver(site.host_url).listen_for_notifications([(target(), "info")], "pool", 1, None)


def test_cleanup_releases_all_and_blocks_until_then(site: Site) -> None:
    """ "Release all resources used by the driver. This method must block until the cleanup is
    complete."
    """
    threads, files = set(threading.enumerate()), descriptors()
    for _ in range(3):
        driver = site.driver(site.host_url)
        received = Received(driver.listen(target(server="s"), 1, None))
        driver.send(target(), {}, message())
        received.end()
        driver.cleanup()
        driver.cleanup()  # harmless
    assert set(threading.enumerate()) <= threads  # some of another test may have ended meanwhile
    # What else this process does may open one meanwhile; each of the three would leave one.
    wait(lambda: descriptors() < files + 3)
    with pytest.raises(om.MessageDeliveryFailure, match="cleaned up"):
        driver.send(target(), {}, message())
